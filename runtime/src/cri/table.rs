//! A service as a table: one row for each call.

/// Implements a service of the CRI for a type that has a method for each call, of the same name,
/// from the request's message to `Result<response, CallError>`. A row names the call, as in logs,
/// its method, and its two messages; `, await` where the method is async. The methods of `urls`
/// also take how the client will reach the streaming server. The messages of a stream are
/// [`Items`](super::pages::Items).
macro_rules! service {
    (
        impl $service:path as $type:ty;
        calls {
            $($call:ident: $method:ident($request:ident) -> $response:ident $(, $wait:tt)?;)*
        }
        $(urls {
            $($url:ident: $give:ident($for:ident) -> $given:ident $(, $checked:tt)?;)*
        })?
        streams {
            $($stream:ident: $open:ident($filter:ident) -> $items:ident = $message:ident $(, $ready:tt)?;)*
        }
    ) => {
        #[tonic::async_trait]
        impl $service for $type {
            $(async fn $method(
                &self,
                request: tonic::Request<berth_cri::v1::$request>,
            ) -> Result<tonic::Response<berth_cri::v1::$response>, tonic::Status> {
                let answer = <$type>::$method(self, request.into_inner())$(.$wait)?;
                answer.map(tonic::Response::new).map_err(|error| super::error::failed(stringify!($call), &error))
            })*
            $($(async fn $give(
                &self,
                request: tonic::Request<berth_cri::v1::$for>,
            ) -> Result<tonic::Response<berth_cri::v1::$given>, tonic::Status> {
                let reach = crate::streaming::Reach::of(request.metadata());
                let answer = <$type>::$give(self, request.into_inner(), reach)$(.$checked)?;
                answer.map(tonic::Response::new).map_err(|error| super::error::failed(stringify!($url), &error))
            })*)?
            $(type $items = super::pages::Items<berth_cri::v1::$message>;

            async fn $open(
                &self,
                request: tonic::Request<berth_cri::v1::$filter>,
            ) -> Result<tonic::Response<Self::$items>, tonic::Status> {
                let answer = <$type>::$open(self, request.into_inner())$(.$ready)?;
                answer.map(tonic::Response::new).map_err(|error| super::error::failed(stringify!($stream), &error))
            })*
        }
    };
}

pub(super) use service;
