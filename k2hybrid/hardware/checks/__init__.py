"""What `k2hybrid doctor` checks, by subject: pure functions of files below a root and of measurements."""
