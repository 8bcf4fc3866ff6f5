"""The passes in build order, name -> module:Class. Adding one: a file here, a line in this table, a test."""

PASSES: dict[str, str] = {
    "load": "deploy.passes.load:Load",
    "adapters": "deploy.passes.adapters:Adapters",
    "prune-vae": "deploy.passes.prune_vae:PruneVae",
    "prune": "deploy.passes.prune:Prune",
    "recover": "deploy.passes.recover:Recover",
    "export": "deploy.passes.export:Export",
    "hoist": "deploy.passes.hoist:Hoist",
    "optimize": "deploy.passes.optimize:Optimize",
    "quantize": "deploy.passes.quantize:Quantize",
    "precision": "deploy.passes.precision:Precision",
    "engine": "deploy.passes.engine:Engine",
    "openvino": "deploy.passes.openvino:OpenVino",
    "share": "deploy.passes.share:Share",
}
