"""Training: models whose sequences are shared by the ranks of a group."""
