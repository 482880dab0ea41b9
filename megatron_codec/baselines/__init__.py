"""What the paper's baselines need beyond a codec."""
