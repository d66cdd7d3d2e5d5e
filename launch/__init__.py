"""Launchers from a laptop to a cluster: TorchX components, a Slurm script, Kubernetes manifests.

The package imports torchx, never gr.
"""
