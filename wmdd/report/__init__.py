"""Stage 4: tables, plots and pages from the records of many runs."""
