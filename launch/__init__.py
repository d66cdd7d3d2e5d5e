"""From a laptop to a cluster: TorchX components, Slurm script, Kubernetes manifests. Imports torchx, never gr."""
