"""The parts of the local stack, which `deployments/stack.py` puts together: what is run, how it is kept running, how nothing is left behind."""
