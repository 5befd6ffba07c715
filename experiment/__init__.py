"""What surrounds a run, whatever learns in it: one subject a module, none of which knows of losses and updates."""
