"""Shipped LazyConfigs; `sparse_detr.get_config(name)` loads one."""
