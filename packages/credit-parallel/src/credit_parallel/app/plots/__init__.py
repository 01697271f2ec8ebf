"""Pictures: the losses of runs, a forecast on a map, and who owns which rows."""

from credit_parallel.app.plots.layout import plot_layout
from credit_parallel.app.plots.losses import plot_losses
from credit_parallel.app.plots.maps import plot_forecast

__all__ = ["plot_forecast", "plot_layout", "plot_losses"]
