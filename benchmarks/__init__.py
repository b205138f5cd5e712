"""What is measured, one file each; results with hardware and command are in `records/`."""
