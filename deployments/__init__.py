"""What is run and how it is started: the deployments, the command line, the local stack, the demo and ready-made requests."""
