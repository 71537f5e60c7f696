"""What is written: grids, sweeps, trajectories, figures of points."""
