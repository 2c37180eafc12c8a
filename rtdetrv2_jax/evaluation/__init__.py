"""COCO's average precision, from detections and the samples of a data set."""

from rtdetrv2_jax.evaluation.average_precision import EvaluationError, Evaluator, Scores

__all__ = ["EvaluationError", "Evaluator", "Scores"]
