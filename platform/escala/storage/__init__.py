"""Where checkpoints and the files of a job live."""
