"""Routers by name. A router is a class in a file of its own and one line here."""

from __future__ import annotations

from moefy.routers.base import Router
from moefy.routers.linear import LinearRouter
from moefy.routers.logistic import LogisticRouter
from moefy.routers.mass import MassRouter
from moefy.routers.mlp import MLPRouter
from moefy.routers.oracle import OracleRouter
from moefy.routers.random import RandomRouter
from moefy.routers.representative import RepresentativeRouter
from moefy.routers.similarity import SimilarityRouter

__all__ = ["ROUTERS", "Router"]

ROUTERS: dict[str, type[Router]] = {
    "representative": RepresentativeRouter,
    "oracle": OracleRouter,
    "mass": MassRouter,
    "random": RandomRouter,
    "similarity": SimilarityRouter,
    "mlp": MLPRouter,
    "linear": LinearRouter,
    "logistic": LogisticRouter,
}
