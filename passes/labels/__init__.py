"""match: where each channel goes, by executing the layout on labels; what can be smoothed. Analyses; no graph is changed."""
