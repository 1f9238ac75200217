"""What escala shows: the pydantic models that `--json`, notebooks and a REST interface share, a noun a module.

A field has one name everywhere, with its unit in it: `compute_flops`, `wall_seconds`, `energy_joules`, `cost_usd`,
`carbon_gco2e`, `..._nats`, `..._bytes`. Of a law's answer `loss_nats`, `low_nats` and `high_nats` are the predicted
loss and its interval; what a run measured stands beside it as `obtained_loss_nats`. A law's inputs have the names of
its columns (`n_active`, `tokens`, ...). None: not known.
"""
