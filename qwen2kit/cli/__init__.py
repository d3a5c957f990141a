"""The command line. One thin module per command; frameworks are imported inside the bodies."""
