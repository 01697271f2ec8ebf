"""Forecasts: a trained model stepped forward, its fields written by all ranks, and scored."""

from credit_parallel.app.forecast.run import open_writer, run_forecast
from credit_parallel.app.forecast.writer import ForecastWriter
from credit_parallel.app.training.scores import LeadScores

__all__ = ["ForecastWriter", "LeadScores", "open_writer", "run_forecast"]
