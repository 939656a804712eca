"""What a run will need and how long it will take, without running it (``ghost-dist plan``)."""
