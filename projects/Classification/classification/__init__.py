"""Image classification with Matching Guided Distillation, on Detectron2 and mgd_det.

- ``classifier``: the model; ``moco``: the unsupervised one.
- ``networks``: the networks of the paper that Detectron2 and mgd_det do not have.
- ``logits``: distillation of logits; ``authors_loss``: the loss as the authors scale it.
- ``datasets``, ``mapper``, ``views``, ``evaluator``: data and scores.
- ``schedules``, ``recipes``: what the configs are made of.
- ``weights``: weights of torchvision and MoCo under this project's names.
- ``results``, ``training``: the study on Fashion-MNIST.
"""
