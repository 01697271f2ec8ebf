"""Pictures: the losses of runs, a forecast on a map, and who owns which rows."""

from credit_parallel.app.plots.forecast_picture import plot_forecast
from credit_parallel.app.plots.layout_picture import plot_layout
from credit_parallel.app.plots.loss_picture import plot_losses

__all__ = ["plot_forecast", "plot_layout", "plot_losses"]
