"""The application: configuration, data, models, training and forecasts, behind the command line."""
