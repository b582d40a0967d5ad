"""What ``fedsim bench`` measures, and with what: workloads, arms (ours, a bare loop, peers), and the measuring."""
