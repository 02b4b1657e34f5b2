"""Language models: SPIN, SPPO and APO, with DPO and IPO as baselines."""
