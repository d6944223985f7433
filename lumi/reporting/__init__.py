"""What runs look like: their curves, figures and evaluations on one HTML page."""
