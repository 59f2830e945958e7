"""Measurements that anybody can run again: `djax bench NAME`. The README's tables are made from what stands in results/."""
