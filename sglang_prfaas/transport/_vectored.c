/* A chunk's payload where it lies in memory, sent or received piece by piece and summed up on its way.
 *
 * One call moves what a socket takes or has: no Python object for each page, and the interpreter is free meanwhile.
 * vector.py says what a Vector is, and does the same in Python where this module cannot be built. The checksum is
 * xxh3-64 of the library that Python's `xxhash` brings, whose functions vector.py hands over once. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>

#define MAX_PARTS 1024 /* of one call: the kernel's UIO_MAXIOV */
#define INTERFACE 1    /* to be raised with every change that vector.py has to know of, there too */

typedef void *(*create_function)(void);
typedef int (*free_function)(void *);
typedef int (*reset_function)(void *, uint64_t);
typedef int (*update_function)(void *, const void *, size_t);
typedef uint64_t (*digest_function)(const void *);

static struct {
    create_function create;
    free_function free;
    reset_function reset;
    update_function update;
    digest_function digest;
} sums;

typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    struct iovec *parts; /* what has yet to move; the first is cut short as it does */
    Py_ssize_t count;    /* of `parts` */
    Py_ssize_t at;       /* the first that has not moved */
    Py_ssize_t nbytes;   /* yet to move */
    Py_ssize_t ahead;    /* bytes of those that are in the sum already: of a piece that did not leave whole */
    void *sum;           /* NULL: none is made */
    int error;           /* of a call that had moved something before: the kernel tells it once */
    char busy;           /* a call is under way, perhaps without the interpreter's lock */
} Vector;

/* --- making one ----------------------------------------------------------------------------------------------------- */

/* Fills `parts`; items next to each other become one. Returns 0, or -1 where one lies outside. */
static int lay_out(Vector *self, const int64_t *rows, Py_ssize_t count, Py_ssize_t size, Py_ssize_t start)
{
    char *base = self->memory.buf;
    Py_ssize_t left = self->nbytes, slots = self->memory.len / size;
    Py_ssize_t last = -1;

    for (Py_ssize_t i = 0; i < count; i++) {
        if (rows[i] < 0 || rows[i] >= slots)
            return -1;
        Py_ssize_t length = size - start;
        if (length > left)
            length = left;
        char *place = base + rows[i] * size + start;
        if (i && (char *)self->parts[last].iov_base + self->parts[last].iov_len == place)
            self->parts[last].iov_len += length;
        else
            self->parts[++last] = (struct iovec){place, length};
        left -= length;
        start = 0;
    }
    self->count = last + 1;
    return 0;
}

static PyObject *vector_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"memory", "rows", "item_bytes", "start", "nbytes", "seed", NULL};
    PyObject *memory, *rows, *seed = Py_None;
    Py_ssize_t item_bytes, start, nbytes;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOnnn|O:Vector", names, &memory, &rows, &item_bytes, &start,
                                     &nbytes, &seed))
        return NULL;
    if (!sums.update) {
        PyErr_SetString(PyExc_RuntimeError, "use() has not been called");
        return NULL;
    }
    if (item_bytes <= 0 || start < 0 || start >= item_bytes || nbytes <= 0 || item_bytes > PY_SSIZE_T_MAX / 4 ||
        nbytes > PY_SSIZE_T_MAX / 4) {
        PyErr_Format(PyExc_ValueError, "%zd bytes from byte %zd of items of %zd bytes", nbytes, start, item_bytes);
        return NULL;
    }
    Vector *self = (Vector *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    Py_buffer places = {0};
    if (PyObject_GetBuffer(memory, &self->memory, PyBUF_SIMPLE) < 0)
        goto failed;
    if (PyObject_GetBuffer(rows, &places, PyBUF_SIMPLE) < 0)
        goto failed;
    self->nbytes = nbytes;
    Py_ssize_t count = (start + nbytes - 1) / item_bytes + 1;
    if (places.len != count * (Py_ssize_t)sizeof(int64_t)) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of slots, expected %zd of 8 bytes", places.len, count);
        goto failed;
    }
    self->parts = PyMem_New(struct iovec, count);
    if (!self->parts) {
        PyErr_NoMemory();
        goto failed;
    }
    if (lay_out(self, places.buf, count, item_bytes, start) < 0) {
        PyErr_Format(PyExc_ValueError, "a slot outside of memory of %zd bytes", self->memory.len);
        goto failed;
    }
    if (seed != Py_None) {
        uint64_t number = PyLong_AsUnsignedLongLong(seed);
        if (number == (uint64_t)-1 && PyErr_Occurred())
            goto failed;
        self->sum = sums.create();
        if (!self->sum) {
            PyErr_NoMemory();
            goto failed;
        }
        sums.reset(self->sum, number);
    }
    PyBuffer_Release(&places);
    return (PyObject *)self;
failed:
    PyBuffer_Release(&places);
    Py_DECREF(self);
    return NULL;
}

static void vector_dealloc(Vector *self)
{
    if (self->sum)
        sums.free(self->sum);
    PyMem_Free(self->parts);
    if (self->memory.obj)
        PyBuffer_Release(&self->memory);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* --- what has moved ------------------------------------------------------------------------------------------------- */

/* The next `limit` bytes at most, as parts; returns how many bytes those are. */
static size_t piece(const Vector *self, struct iovec *found, int room, size_t limit, int *count)
{
    size_t total = 0;
    Py_ssize_t at = self->at;

    *count = 0;
    while (at < self->count && *count < room && total < limit) {
        found[*count] = self->parts[at++];
        if (found[*count].iov_len > limit - total)
            found[*count].iov_len = limit - total;
        total += found[(*count)++].iov_len;
    }
    return total;
}

static void moved(Vector *self, size_t nbytes)
{
    self->nbytes -= nbytes;
    while (nbytes) {
        struct iovec *part = &self->parts[self->at];
        if (nbytes < part->iov_len) {
            part->iov_base = (char *)part->iov_base + nbytes;
            part->iov_len -= nbytes;
            return;
        }
        nbytes -= part->iov_len;
        self->at++;
    }
}

/* Add bytes `from` to `to` of what is to move next to the sum. */
static void sum_up(Vector *self, size_t from, size_t to)
{
    for (Py_ssize_t at = self->at; self->sum && to; at++) {
        const struct iovec *part = &self->parts[at];
        size_t length = part->iov_len < to ? part->iov_len : to;
        if (from < length)
            sums.update(self->sum, (const char *)part->iov_base + from, length - from);
        from -= from < length ? from : length;
        to -= length;
    }
}

static int begin(Vector *self, int writes, Py_ssize_t piece_bytes)
{
    if (piece_bytes <= 0) {
        PyErr_Format(PyExc_ValueError, "pieces of %zd bytes", piece_bytes);
        return -1;
    }
    if (writes && self->memory.readonly) {
        PyErr_SetString(PyExc_TypeError, "this vector's memory is only to be read");
        return -1;
    }
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "another thread moves this vector");
        return -1;
    }
    self->busy = 1;
    return 0;
}

/* --- sending -------------------------------------------------------------------------------------------------------- */

/* Returns bytes sent, those of `before` included; 0 with errno set where nothing could be. */
static size_t send_all(Vector *self, int fd, const Py_buffer *before, size_t piece_bytes)
{
    struct iovec parts[MAX_PARTS];
    size_t total = 0, prefix = before->len;

    if (self->error) {
        errno = self->error;
        return 0;
    }
    parts[0] = (struct iovec){before->buf, prefix};
    while (self->nbytes) {
        int own = prefix != 0, count;
        size_t length = piece(self, parts + own, MAX_PARTS - own, piece_bytes, &count);
        if ((size_t)self->ahead < length) {
            sum_up(self, self->ahead, length);
            self->ahead = length;
        }
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = count + own};
        ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_MORE | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0) {
            if (total && errno != EAGAIN && errno != EWOULDBLOCK)
                self->error = errno;
            break;
        }
        total += sent;
        if ((size_t)sent < prefix)
            break;
        sent -= prefix;
        moved(self, sent);
        self->ahead -= sent;
        prefix = 0;
        if ((size_t)sent < length)
            break;
    }
    return total;
}

static PyObject *vector_send(Vector *self, PyObject *args)
{
    int fd;
    Py_ssize_t piece_bytes;
    Py_buffer before;

    if (!PyArg_ParseTuple(args, "iy*n:send", &fd, &before, &piece_bytes))
        return NULL;
    PyObject *result = NULL;
    if (begin(self, 0, piece_bytes) == 0) {
        size_t sent;
        int error;
        Py_BEGIN_ALLOW_THREADS
        errno = 0;
        sent = send_all(self, fd, &before, piece_bytes);
        error = errno;
        Py_END_ALLOW_THREADS
        self->busy = 0;
        if (sent || !error || error == EAGAIN || error == EWOULDBLOCK)
            result = PyLong_FromSize_t(sent);
        else {
            errno = error;
            PyErr_SetFromErrno(PyExc_OSError);
        }
    }
    PyBuffer_Release(&before);
    return result;
}

/* --- receiving ------------------------------------------------------------------------------------------------------ */

/* Returns bytes received, those of `after` included; else 0 at the end, -1 with errno set. */
static ssize_t receive_all(Vector *self, int fd, const Py_buffer *after, size_t piece_bytes)
{
    struct iovec parts[MAX_PARTS];
    size_t total = 0;

    if (self->error) {
        errno = self->error;
        return -1;
    }
    for (;;) {
        int count;
        size_t length = piece(self, parts, MAX_PARTS - 1, piece_bytes, &count);
        size_t asked = length;
        if (length == (size_t)self->nbytes && after->len) {
            parts[count++] = (struct iovec){after->buf, after->len};
            asked += after->len;
        }
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
        ssize_t came = recvmsg(fd, &message, MSG_DONTWAIT);
        if (came < 0 && errno == EINTR)
            continue;
        if (came < 0 && total && errno != EAGAIN && errno != EWOULDBLOCK)
            self->error = errno;
        if (came <= 0)
            return total ? (ssize_t)total : came;
        size_t own = (size_t)came < length ? (size_t)came : length;
        sum_up(self, 0, own);
        moved(self, own);
        total += came;
        if ((size_t)came < asked || !self->nbytes)
            return total;
    }
}

static PyObject *vector_receive(Vector *self, PyObject *args)
{
    int fd;
    Py_ssize_t piece_bytes;
    Py_buffer after;

    if (!PyArg_ParseTuple(args, "iw*n:receive", &fd, &after, &piece_bytes))
        return NULL;
    PyObject *result = NULL;
    if (begin(self, 1, piece_bytes) == 0) {
        ssize_t came;
        int error;
        Py_BEGIN_ALLOW_THREADS
        came = receive_all(self, fd, &after, piece_bytes);
        error = errno;
        Py_END_ALLOW_THREADS
        self->busy = 0;
        if (came >= 0)
            result = PyLong_FromSsize_t(came);
        else if (error == EAGAIN || error == EWOULDBLOCK)
            result = Py_NewRef(Py_None);
        else {
            errno = error;
            PyErr_SetFromErrno(PyExc_OSError);
        }
    }
    PyBuffer_Release(&after);
    return result;
}

static PyObject *vector_put(Vector *self, PyObject *arg)
{
    Py_buffer data;

    if (PyObject_GetBuffer(arg, &data, PyBUF_SIMPLE) < 0)
        return NULL;
    Py_ssize_t done = 0;
    if (begin(self, 1, 1) == 0) {
        Py_ssize_t wanted = data.len < self->nbytes ? data.len : self->nbytes;
        while (done < wanted) {
            struct iovec *part = &self->parts[self->at];
            size_t length = part->iov_len < (size_t)(wanted - done) ? part->iov_len : (size_t)(wanted - done);
            memcpy(part->iov_base, (const char *)data.buf + done, length);
            sum_up(self, 0, length);
            moved(self, length);
            done += length;
        }
        self->busy = 0;
    }
    PyBuffer_Release(&data);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(done);
}

/* --- the module ----------------------------------------------------------------------------------------------------- */

static PyObject *vector_digest(Vector *self, PyObject *Py_UNUSED(ignored))
{
    if (!self->sum) {
        PyErr_SetString(PyExc_RuntimeError, "this vector makes no checksum");
        return NULL;
    }
    return PyLong_FromUnsignedLongLong(sums.digest(self->sum));
}

static PyMethodDef vector_methods[] = {
    {"send", (PyCFunction)vector_send, METH_VARARGS, NULL},
    {"receive", (PyCFunction)vector_receive, METH_VARARGS, NULL},
    {"put", (PyCFunction)vector_put, METH_O, NULL},
    {"digest", (PyCFunction)vector_digest, METH_NOARGS, NULL},
    {NULL},
};

static PyMemberDef vector_members[] = {
    {"nbytes", T_PYSSIZET, offsetof(Vector, nbytes), READONLY, NULL},
    {NULL},
};

static PyTypeObject vector_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "sglang_prfaas.transport._vectored.Vector",
    .tp_basicsize = sizeof(Vector),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = vector_new,
    .tp_dealloc = (destructor)vector_dealloc,
    .tp_methods = vector_methods,
    .tp_members = vector_members,
};

static PyObject *use(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long create, release, reset, update, digest;

    if (!PyArg_ParseTuple(args, "KKKKK:use", &create, &release, &reset, &update, &digest))
        return NULL;
    sums.create = (create_function)(uintptr_t)create;
    sums.free = (free_function)(uintptr_t)release;
    sums.reset = (reset_function)(uintptr_t)reset;
    sums.update = (update_function)(uintptr_t)update;
    sums.digest = (digest_function)(uintptr_t)digest;
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"use", use, METH_VARARGS, NULL},
    {NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sglang_prfaas.transport._vectored",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__vectored(void)
{
    if (PyType_Ready(&vector_type) < 0)
        return NULL;
    PyObject *found = PyModule_Create(&module);
    if (found && (PyModule_AddObjectRef(found, "Vector", (PyObject *)&vector_type) < 0 ||
                  PyModule_AddIntConstant(found, "INTERFACE", INTERFACE) < 0))
        Py_CLEAR(found);
    return found;
}
