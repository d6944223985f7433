"""`lumi plan`: what a run on many GPUs would need, by arithmetic."""
