"""Training: the train module (what a step is), the trainer (the loop), callbacks (what has a schedule)."""
