"""Report on a run from its store: text, a page, plots, and a live line."""
