"""What a program costs: FLOPs, compiled memory and collectives, chips, measured time. Above train, below scripts."""
