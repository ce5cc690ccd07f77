"""What report.py and pareto.py make of results: tables, plots, and what holds of them."""
