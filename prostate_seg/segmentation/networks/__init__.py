"""Networks by name, and trained networks on disk: weights and recipe, ONNX, the model folder, the registered model.

Training them is the subject of training/, running them on studies that of inference/.
"""
