"""A page about a run of the suite: `python -m evals report out.json [history...] -o report.html`."""
