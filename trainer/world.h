// The processes of a run, in MPI's terms: the world. A launcher (mpirun, srun) starts them and MPI joins them. A
// process that was started alone is its own world and calls nothing of MPI, whose libraries load parts by name that a
// machine with one GPU need not have.
#pragma once
#include <mpi.h>

#include <cstdint>
#include <cstdlib>

#include "trainer/basics.h"

// Whether a launcher says that this is one of its processes: Open MPI's, one by PMI or PMIx (Slurm, MPICH), or a Slurm
// step of several tasks, which without either of them would be as many runs.
inline bool started_by_launcher() {
    for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_FD"}) {
        if (getenv(name)) return true;
    }
    const char* tasks = getenv("SLURM_STEP_NUM_TASKS");
    return tasks && atoi(tasks) > 1;
}

struct World {
    int rank = 0, ranks = 1;  // until MPI is up, too: that may be what hangs
    World() {
        int initialized;
        MPI_Initialized(&initialized);
        if (!initialized) return;
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
        MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    }
};

inline void enter_world(int* argc, char*** argv) {
    if (started_by_launcher()) MPI_Init(argc, argv);
}

inline void leave_world() {
    int initialized;
    MPI_Initialized(&initialized);
    if (initialized) MPI_Finalize();
}

// Ends all ranks, this one last, or does nothing in a world of one.
inline void abort_world(int exit_status) {
    if (World().ranks > 1) MPI_Abort(MPI_COMM_WORLD, exit_status);
}

// What follows is called by all ranks.

inline void wait_for_world() {
    if (World().ranks > 1) MPI_Barrier(MPI_COMM_WORLD);
}

inline void broadcast_bytes(void* data, int64_t bytes, int root) {
    if (World().ranks > 1) MPI_Bcast(data, narrow(bytes), MPI_BYTE, root, MPI_COMM_WORLD);
}

inline void reduce(int* values, int count, MPI_Op operation) {
    if (World().ranks > 1) MPI_Allreduce(MPI_IN_PLACE, values, count, MPI_INT, operation, MPI_COMM_WORLD);
}
inline void reduce(double* values, int count, MPI_Op operation) {
    if (World().ranks > 1) MPI_Allreduce(MPI_IN_PLACE, values, count, MPI_DOUBLE, operation, MPI_COMM_WORLD);
}

// The rank among those on the same machine.
inline int rank_on_machine() {
    const World world;
    if (world.ranks == 1) return 0;
    int rank;
    MPI_Comm machine;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, world.rank, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &rank);
    MPI_Comm_free(&machine);
    return rank;
}
