from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import DataAccessConformance


class TestMem(DataAccessConformance):
    def make_data_access(self, clock):
        return InMemoryDataAccess(clock=clock)
