"""What is run: the settings, the configurations, a configuration's run, and what of it is kept."""
