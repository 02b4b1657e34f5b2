"""What all jobs share: configuration, runs, stages, processes, metrics, report, command line."""
