from tests.support.sharded import make_bags, make_table

__all__ = ["make_bags", "make_table"]
