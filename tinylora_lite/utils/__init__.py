"""What every other room uses: progress bars, seeds, processes, and the record of a run."""
