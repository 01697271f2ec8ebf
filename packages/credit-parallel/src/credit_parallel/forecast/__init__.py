"""Forecasts: a trained model stepped forward, its fields written by all ranks, and scored."""

from credit_parallel.forecast.run import open_writer, run_forecast
from credit_parallel.forecast.scores import LeadScores
from credit_parallel.forecast.writer import ForecastWriter

__all__ = ["ForecastWriter", "LeadScores", "open_writer", "run_forecast"]
