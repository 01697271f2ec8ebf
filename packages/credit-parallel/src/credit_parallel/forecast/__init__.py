"""Forecasts: a trained model stepped forward, its fields written by all ranks, and scored."""

from credit_parallel.forecast.run import open_writer, run_forecast
from credit_parallel.forecast.writer import ForecastWriter
from credit_parallel.training.scores import LeadScores

__all__ = ["ForecastWriter", "LeadScores", "open_writer", "run_forecast"]
