"""Everything around a run except the learning. Each module has one subject; none knows of losses and updates."""
