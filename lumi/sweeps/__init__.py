"""Many runs: a search over settings, and the law that their losses follow."""
