"""What a run left behind: its config and checkpoints found, its module and data made again."""
