"""Network architectures by name, and trained networks on disk: weights and recipe, ONNX, model folder, MLflow flavour.

Training is in training/, running networks on studies in inference/.
"""
