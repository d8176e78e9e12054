"""What every adapter shares: its interface, checkpoints, repairs, verification."""
