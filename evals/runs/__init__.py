"""What is run: the settings, the configurations, a configuration's run, and what is stored of it."""
