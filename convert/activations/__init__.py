"""What goes into each MLP on the calibration text, and what should come out: captured, kept, and dealt out."""
