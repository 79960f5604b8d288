"""The parts of the local stack: what is run, how it is kept running, how nothing is left behind. `deployments/stack.py` joins them."""
