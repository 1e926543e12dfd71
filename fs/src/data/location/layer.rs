//! A layer over an object store: it does some requests in its own way and passes on the others.
//!
//! Invariants:
//! - What a layer does not say goes to the store below, unchanged.

use std::{fmt, sync::Arc};

use futures::{FutureExt, future::BoxFuture, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result as ObjectResult, path::Path,
};

/// The requests that a layer may do in its own way.
pub trait StoreLayer: fmt::Debug + fmt::Display + Send + Sync + 'static {
    /// The store that the request of this moment is passed on to.
    fn below(&self) -> Arc<dyn ObjectStore>;

    /// Called before anything is written at `at`; an error is the answer to the request.
    fn before_write<'a>(&'a self, at: &'a Path) -> BoxFuture<'a, ObjectResult<()>> {
        let _ = at;
        std::future::ready(Ok(())).boxed()
    }

    /// Puts an object.
    fn put<'a>(
        &'a self,
        at: &'a Path,
        bytes: PutPayload,
        options: PutOptions,
    ) -> BoxFuture<'a, ObjectResult<PutResult>> {
        let below = self.below();
        async move { below.put_opts(at, bytes, options).await }.boxed()
    }

    /// Gets an object, a range of it, or what it is.
    fn get<'a>(&'a self, at: &'a Path, options: GetOptions) -> BoxFuture<'a, ObjectResult<GetResult>> {
        let below = self.below();
        async move { below.get_opts(at, options).await }.boxed()
    }

    /// Lists what is below a prefix.
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, ObjectResult<ObjectMeta>> {
        self.below().list(prefix)
    }
}

/// A store with a layer.
#[derive(Debug)]
pub struct LayeredStore<L>(pub L);

impl<L: StoreLayer> fmt::Display for LayeredStore<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl<L: StoreLayer> ObjectStore for LayeredStore<L> {
    fn put_opts<'s, 'l, 'a>(
        &'s self,
        at: &'l Path,
        bytes: PutPayload,
        options: PutOptions,
    ) -> BoxFuture<'a, ObjectResult<PutResult>>
    where
        's: 'a,
        'l: 'a,
        Self: 'a,
    {
        let put = async move {
            self.0.before_write(at).await?;
            self.0.put(at, bytes, options).await
        };
        put.boxed()
    }

    fn put_multipart_opts<'s, 'l, 'a>(
        &'s self,
        at: &'l Path,
        options: PutMultipartOptions,
    ) -> BoxFuture<'a, ObjectResult<Box<dyn MultipartUpload>>>
    where
        's: 'a,
        'l: 'a,
        Self: 'a,
    {
        let put = async move {
            self.0.before_write(at).await?;
            self.0.below().put_multipart_opts(at, options).await
        };
        put.boxed()
    }

    fn get_opts<'s, 'l, 'a>(
        &'s self,
        at: &'l Path,
        options: GetOptions,
    ) -> BoxFuture<'a, ObjectResult<GetResult>>
    where
        's: 'a,
        'l: 'a,
        Self: 'a,
    {
        self.0.get(at, options)
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, ObjectResult<Path>>,
    ) -> BoxStream<'static, ObjectResult<Path>> {
        self.0.below().delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, ObjectResult<ObjectMeta>> {
        self.0.list(prefix)
    }

    fn list_with_delimiter<'s, 'l, 'a>(
        &'s self,
        prefix: Option<&'l Path>,
    ) -> BoxFuture<'a, ObjectResult<ListResult>>
    where
        's: 'a,
        'l: 'a,
        Self: 'a,
    {
        let below = self.0.below();
        async move { below.list_with_delimiter(prefix).await }.boxed()
    }

    fn copy_opts<'s, 'f, 't, 'a>(
        &'s self,
        from: &'f Path,
        to: &'t Path,
        options: CopyOptions,
    ) -> BoxFuture<'a, ObjectResult<()>>
    where
        's: 'a,
        'f: 'a,
        't: 'a,
        Self: 'a,
    {
        let copy = async move {
            self.0.before_write(to).await?;
            self.0.below().copy_opts(from, to, options).await
        };
        copy.boxed()
    }
}
